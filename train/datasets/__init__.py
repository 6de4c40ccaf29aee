"""Cities from elsewhere as the two tables of the contract."""
