"""What a compressed context kept: as numbers (`summary`), in the terminal (`terminal`), as a page (`html`)."""
