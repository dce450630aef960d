"""What comes from elsewhere: models in other formats, and what transformers says on its way."""
