"""The parts of one run: its folder, data, parameters, validation, what must stay the same."""
