//! The README's recipe, for the programs.

pub mod queue;
