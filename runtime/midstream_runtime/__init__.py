"""What runs in the serving pod: gateway, engine, KV pool, handoff."""
