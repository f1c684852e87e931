"""The edits of Ramesh et al. 2022, section 3.

An image is encoded as the pair (z_i, x_T) of its CLIP embedding and of the noise from which DDIM generates it
(section 3, "bipartite latent representation"):

  variations      fresh noise, or x_T under DDIM with eta > 0 (section 3.1)
  reconstruct     x_T under DDIM with eta = 0
  interpolate     slerp(z_a, z_b, theta), theta from 0 to 1, between images and captions (section 3.2)
  mix             a weighted mean of embeddings
  text_diff       slerp(z_i, z_d, theta), z_d = normalised(z_t - z_t0), with x_T of the image (section 3.3)
  typographic_probe   variations of an image with a word on it, and what CLIP recognises in it (figure 6)
  inpaint         the decoder is conditioned on a caption, or on the image's own embedding, and known pixels are put
                  back at every step
  outpaint        inpaint, in windows that move outwards
"""
