"""Turns a finished adapter into what other servers read: the merged model, and files for readers that need another
form. A process of its own (`python -m training.export`): a JSON request on stdin, JSON lines on stdout."""
