"""Long proofs as commands: `python -m tests.campaigns.<name>`; a slice of each is in the test suite."""
