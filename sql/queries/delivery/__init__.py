"""What happens to an adapter after its job is completed: who does which delivery, and how it ended."""
