"""The KV-store process: owns the CPU KV cache and says who may use which block of it."""
