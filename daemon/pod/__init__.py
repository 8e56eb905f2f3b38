"""The RunPod pod that this host runs on: its price, its lifetime, its shutdown, and the API client. No pod stays idle
and billed. The worker asks whether to leave; the fleet and doctor use the API client."""
