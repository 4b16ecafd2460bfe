"""Networks as pure functions of one flat parameter vector: ConvNet, any module, and the public code's networks by name."""
