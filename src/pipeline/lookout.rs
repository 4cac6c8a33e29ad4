//! What is seen of databases.
use crate::couch::databases::Info;
use crate::pure::hint::Hint;
use std::sync::Arc;

/// What is seen.
#[derive(Debug, Clone)]
pub enum Sighting {
    /// Hints.
    Hinted(Arc<Vec<Hint>>),
    /// A part of a sweep.
    Infos(Arc<Vec<(String, Info)>>),
    /// A whole sweep.
    Swept,
}
/// STUB
#[derive(Debug)]
pub struct Lookout;
impl Lookout {
    /// STUB
    pub fn subscribe(&self, _: crossbeam_channel::Sender<Sighting>) {}
}
