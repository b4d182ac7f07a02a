"""How the small model that ships with the pack is made: data, training, evidence. See README.md here."""
