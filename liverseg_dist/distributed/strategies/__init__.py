"""Parallel strategies behind one interface: DDP, FSDP2 and DeepSpeed ZeRO."""
