"""Thin Ray shells (layer 3): handles, refs, one engine; methods unpack, call one pure function, return."""
