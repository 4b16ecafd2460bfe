"""Students, which compute one step: what every student does, ConvNet's and those of any network, and their memory."""
