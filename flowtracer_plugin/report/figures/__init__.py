"""Figures for papers: PNG, SVG and PDF."""
