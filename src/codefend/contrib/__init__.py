"""The research shelf: peers, Hugging Face backbones, FARE, Open Image Denoise and rare attacks."""
