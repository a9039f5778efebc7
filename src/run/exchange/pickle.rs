//! A pickle machine that executes nothing. It knows the opcodes of plain data and of the few objects that `torch` below
//! lets it build; names of anything else end it. What it builds lies in one flat list and refers by number, so that
//! neither depth nor sharing costs more than the bytes that ask for it.

use super::torch;
use std::collections::HashMap;

/// A node's number.
pub type Id = usize;

/// The most bytes of a pickle, and the most nodes and memos that it may make: the official files with their optimizers
/// take some tens of thousands.
pub const MOST_BYTES: u64 = 16 << 20;
const MOST_NODES: usize = 1 << 20;
/// The deepest nesting of what is being built.
const DEEPEST: usize = 256;

/// What a pickle describes.
#[derive(Clone, Debug)]
pub enum Node {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// One of the names that `torch` knows.
    Global(torch::Global),
    Storage(torch::Storage),
    Tensor(torch::View),
    /// An object of no further interest, with the attributes that it was given.
    Bag(Option<Id>),
}

/// All nodes, and the outermost one.
#[derive(Debug)]
pub struct Pickle {
    pub nodes: Vec<Node>,
    pub root: Id,
}

/// Reads a pickle, or says why it is refused.
pub fn read(bytes: &[u8]) -> Result<Pickle, String> {
    let mut machine = Machine { bytes, ..Machine::default() };
    machine.run()?;
    let root = machine.pop()?;
    Ok(Pickle { nodes: machine.nodes, root })
}

#[derive(Default)]
struct Machine<'a> {
    bytes: &'a [u8],
    nodes: Vec<Node>,
    stack: Vec<Id>,
    /// The stack's height at each mark.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<(), String> {
        loop {
            let op = self.byte()?;
            match op {
                b'.' => return Ok(()),
                0x80 => {
                    let protocol = self.byte()?;
                    if !(2..=5).contains(&protocol) {
                        return Err(format!("it is in pickle protocol {protocol}; 2 to 5 are read"));
                    }
                }
                0x95 => drop(self.take(8)?), // A frame's length: a hint for readers of streams.
                b'N' | 0x88 | 0x89 | b'J' | b'K' | b'M' | 0x8a | b'G' | b'X' | 0x8c | b'U' => self.plain(op)?,
                b'(' | b'0' | b'1' | b'q' | b'r' | b'h' | b'j' | 0x94 => self.shuffle(op)?,
                b')' | b't' | 0x85..=0x87 | b']' | b'l' | b'a' | b'e' | b'}' | b'd' | b's' | b'u' => {
                    self.collect(op)?
                }
                b'c' | 0x93 | b'R' | 0x81 | b'b' | b'Q' => self.object(op)?,
                other => return Err(format!("it uses the opcode 0x{other:02x}, which no state dict needs")),
            }
        }
    }

    /// Numbers and texts.
    fn plain(&mut self, op: u8) -> Result<(), String> {
        let node = match op {
            b'N' => Node::None,
            0x88 | 0x89 => Node::Bool(op == 0x88),
            b'J' => Node::Int(i32::from_le_bytes(self.array()?).into()),
            b'K' => Node::Int(self.byte()?.into()),
            b'M' => Node::Int(u16::from_le_bytes(self.array()?).into()),
            0x8a => Node::Int(self.long()?),
            b'G' => Node::Float(f64::from_be_bytes(self.array()?)),
            _ => {
                let length = if op == b'X' { u32::from_le_bytes(self.array()?) } else { self.byte()?.into() };
                let text = std::str::from_utf8(self.take(length as usize)?).map_err(|_| "a text in it is not UTF-8")?;
                Node::Text(text.to_owned())
            }
        };
        self.push(node)
    }

    /// A two's complement number of so many bytes as the next one says.
    fn long(&mut self) -> Result<i64, String> {
        let length = self.byte()?.into();
        let bytes = self.take(length)?;
        if length > 8 {
            return Err(format!("it holds an integer of {length} bytes"));
        }
        let fill = if bytes.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 };
        let mut wide = [fill; 8];
        wide[..length].copy_from_slice(bytes);
        Ok(i64::from_le_bytes(wide))
    }

    /// The stack, marks and memo.
    fn shuffle(&mut self, op: u8) -> Result<(), String> {
        match op {
            b'(' => {
                if self.marks.len() == DEEPEST {
                    return Err(format!("it is nested deeper than {DEEPEST}"));
                }
                self.marks.push(self.stack.len());
            }
            b'0' => drop(self.pop()?),
            b'1' => drop(self.since_mark()?),
            b'h' | b'j' => {
                let key = if op == b'h' { self.byte()?.into() } else { u32::from_le_bytes(self.array()?) };
                let id = *self.memo.get(&key).ok_or("it refers to what it has not made")?;
                self.stack.push(id);
            }
            _ => {
                let key = match op {
                    b'q' => self.byte()?.into(),
                    b'r' => u32::from_le_bytes(self.array()?),
                    _ => self.memo.len() as u32,
                };
                let id = self.top()?;
                self.memo.insert(key, id);
                if self.memo.len() > MOST_NODES {
                    return Err(format!("it remembers more than {MOST_NODES} values"));
                }
            }
        }
        Ok(())
    }

    /// Tuples, lists and dictionaries.
    fn collect(&mut self, op: u8) -> Result<(), String> {
        match op {
            b')' => self.push(Node::Tuple(Vec::new())),
            0x85..=0x87 => {
                let mut items = (0..op - 0x84).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
                items.reverse();
                self.push(Node::Tuple(items))
            }
            b't' | b'l' => {
                let items = self.since_mark()?;
                self.push(if op == b't' { Node::Tuple(items) } else { Node::List(items) })
            }
            b']' => self.push(Node::List(Vec::new())),
            b'}' => self.push(Node::Dict(Vec::new())),
            b'd' => {
                let items = pairs(&self.since_mark()?)?;
                self.push(Node::Dict(items))
            }
            b'a' | b'e' => {
                let items = if op == b'a' { vec![self.pop()?] } else { self.since_mark()? };
                match self.top_node()? {
                    Node::List(list) => list.extend(items),
                    _ => return Err("it appends to what is no list".into()),
                }
                Ok(())
            }
            _ => {
                let mut items = if op == b's' { vec![self.pop()?, self.pop()?] } else { self.since_mark()? };
                if op == b's' {
                    items.reverse();
                }
                let items = pairs(&items)?;
                match self.top_node()? {
                    Node::Dict(dict) => dict.extend(items),
                    _ => return Err("it sets items of what is no dictionary".into()),
                }
                Ok(())
            }
        }
    }

    /// Names, and what is made by them: `torch` decides.
    fn object(&mut self, op: u8) -> Result<(), String> {
        let node = match op {
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                Node::Global(torch::global(module, name)?)
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (&self.nodes[module], &self.nodes[name]) {
                    (Node::Text(module), Node::Text(name)) => Node::Global(torch::global(module, name)?),
                    _ => return Err("it names something by what is no text".into()),
                }
            }
            b'Q' => {
                let id = self.pop()?;
                torch::storage(&self.nodes, id)?
            }
            b'b' => {
                let (state, made) = (self.pop()?, self.top()?);
                return torch::build(&mut self.nodes, made, state);
            }
            _ => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                torch::make(&self.nodes, callable, arguments)?
            }
        };
        self.push(node)
    }

    fn push(&mut self, node: Node) -> Result<(), String> {
        if self.nodes.len() == MOST_NODES {
            return Err(format!("it makes more than {MOST_NODES} values"));
        }
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, String> {
        let id = self.top()?;
        self.stack.pop();
        Ok(id)
    }

    /// The uppermost value above the last mark.
    fn top(&self) -> Result<Id, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack[floor..].last().copied().ok_or_else(|| "it takes more from its stack than it put there".to_owned())
    }

    fn top_node(&mut self) -> Result<&mut Node, String> {
        let id = self.top()?;
        Ok(&mut self.nodes[id])
    }

    /// Everything above the last mark, which goes.
    fn since_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("it lacks a mark")?;
        Ok(self.stack.split_off(mark))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.bytes.split_at_checked(length).ok_or("it ends too early")?;
        self.bytes = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        Ok(self.take(N)?.try_into().expect("that many bytes"))
    }

    /// Up to the next line feed.
    fn line(&mut self) -> Result<&'a str, String> {
        let length = self.bytes.iter().position(|&byte| byte == b'\n').ok_or("it ends too early")?;
        let line = std::str::from_utf8(self.take(length + 1)?).map_err(|_| "a name in it is not UTF-8")?;
        Ok(line.trim_end_matches('\n'))
    }
}

fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>, String> {
    match items.len() % 2 {
        0 => Ok(items.chunks(2).map(|pair| (pair[0], pair[1])).collect()),
        _ => Err("it has a key without a value".into()),
    }
}
