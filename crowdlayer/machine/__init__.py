"""What the job runs on: processes, nodes, devices, processors, memory, signals."""
