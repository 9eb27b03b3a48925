"""Using a trained model of text: continuing a text, reading texts into its memory."""
