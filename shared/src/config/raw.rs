//! The file as it is written. Unknown keys are refused.
