"""What can be known before a model is loaded: does it fit, how long will it take, what will it cost. A job that cannot
succeed fails here, in seconds."""
