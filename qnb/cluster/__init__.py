"""The same study on several GPUs and machines, by Ray."""
