"""Tiny models, the oracle and the conformance suites that kvkeep is tested with."""
