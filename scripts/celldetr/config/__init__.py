"""What a user may set: settings of all blocks, sheets, the whole configuration and its schema. Imports no torch."""
