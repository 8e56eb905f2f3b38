"""What follows a completed job: exports of its adapter, a push to the hub, an endpoint that answers with it.

Each is a row of training_deliveries. Any host that can do its kind claims it; a host that dies loses nothing. A
delivery never fails a training. The service starts the runner; each kind is one file of `steps`.
"""
