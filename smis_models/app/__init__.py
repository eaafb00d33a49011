"""The pages: that of `smis paint`, on which label maps are painted, and that of `smis demo`."""
