"""Other people's models, faster and unchanged: fused forwards put into an existing network."""
