"""What a trained model gives: predictions, nuclei of a slide, embeddings, attention, similarity."""
