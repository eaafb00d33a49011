"""The zoo: networks, published options and names of every family."""
