"""What runs have learnt as one HTML file: curves, depth before and after, a point cloud to turn, cameras, a generated clip."""
