"""Other systems that serve kvzip's contexts. Each is imported only where it is used."""
