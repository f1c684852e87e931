"""Karlo and its relatives: diffusers folders, Karlo's released files, Kandinsky's and ECLIPSE's priors."""
