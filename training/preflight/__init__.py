"""What can be known before a model is loaded: whether it fits, how long it takes, what it costs. A job that cannot
succeed fails here, in seconds."""
