"""Is a dataset what its index says, and is it fit to train and measure on? `check.check_data` tells."""
