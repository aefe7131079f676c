"""What the agent shares with the processes in the pod. Imports nothing outside the standard library."""
