"""What a format gives: latency, throughput, memory and energy."""
