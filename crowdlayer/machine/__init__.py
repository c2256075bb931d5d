"""What the job runs on: processes, nodes, their network, processors, memory, signals."""
