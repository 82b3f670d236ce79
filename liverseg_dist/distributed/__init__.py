"""Ranks: environment, rendezvous, collective calls, heartbeats, and strategies."""
