"""How a small model to ship with the pack is made: data, training, evidence. See README.md here."""
