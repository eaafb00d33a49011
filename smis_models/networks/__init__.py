"""Parts that the networks of several families share."""
