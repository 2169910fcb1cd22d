//! PEM in, identities and trust rules out.
