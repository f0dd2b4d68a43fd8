"""Features in other files and formats, several outputs as one, and two outputs held against each other."""
