"""`deepar demo`: a cloud, two edges and four devices in this process, and the picture of who worked on what."""
