"""Small models by name: where they come from, how they are fetched and converted."""
