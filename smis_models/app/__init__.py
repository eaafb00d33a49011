"""The local page of `smis paint`: paint a label map and see its picture."""
