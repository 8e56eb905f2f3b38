"""The RunPod pod around this host: its price, its lifetime, its end, and the API that ends it. No pod is left idle and
billed. The worker asks whether its time is up; the fleet and doctor use the API client."""
