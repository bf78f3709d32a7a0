"""The definitions of the operators in pure, functional PyTorch: any device, float64 too; the oracle of the tests."""
