//! A pickle reader that executes nothing. It knows the opcodes of plain data and of the few objects that `torch`
//! allows, and rejects every other name. Values are stored in one flat list and refer to each other by index, so that
//! neither nesting nor sharing costs more memory than the bytes that describe it.

use super::torch::{self, Node, NodeId};
use std::collections::HashMap;

/// Maximum size of a pickle in bytes.
pub const MAX_BYTES: u64 = 16 << 20;
/// Maximum number of values and of memo entries; the official files with their optimizer states have tens of thousands.
const MAX_NODES: usize = 1 << 20;
/// Maximum nesting of unfinished collections.
const MAX_DEPTH: usize = 256;

/// The values of a pickle.
#[derive(Debug)]
pub struct Pickle {
    pub nodes: Vec<Node>,
    /// Index of the outermost value.
    pub root: NodeId,
}

/// Reads a pickle, or returns the reason for rejecting it.
pub fn parse(bytes: &[u8]) -> Result<Pickle, String> {
    let mut unpickler = Unpickler { bytes, ..Unpickler::default() };
    unpickler.run()?;
    let root = unpickler.pop()?;
    Ok(Pickle { nodes: unpickler.nodes, root })
}

#[derive(Default)]
struct Unpickler<'a> {
    /// Bytes not read yet.
    bytes: &'a [u8],
    nodes: Vec<Node>,
    stack: Vec<NodeId>,
    /// Height of the stack at each mark.
    marks: Vec<usize>,
    memo: HashMap<u32, NodeId>,
}

impl<'a> Unpickler<'a> {
    fn run(&mut self) -> Result<(), String> {
        loop {
            let op = self.byte()?;
            match op {
                b'.' => return Ok(()),
                0x80 => {
                    let protocol = self.byte()?;
                    if !(2..=5).contains(&protocol) {
                        return Err(format!("it uses pickle protocol {protocol}; protocols 2 to 5 are supported"));
                    }
                }
                0x95 => drop(self.bytes(8)?), // Length of a frame, a hint for streaming readers.
                b'N' | 0x88 | 0x89 | b'J' | b'K' | b'M' | 0x8a | b'G' | b'X' | 0x8c | b'U' => self.scalar(op)?,
                b'(' | b'0' | b'1' | b'q' | b'r' | b'h' | b'j' | 0x94 => self.stack_op(op)?,
                b')' | b't' | 0x85..=0x87 | b']' | b'l' | b'a' | b'e' | b'}' | b'd' | b's' | b'u' => {
                    self.collection(op)?
                }
                b'c' | 0x93 | b'R' | 0x81 | b'b' | b'Q' => self.object(op)?,
                other => return Err(format!("it uses the opcode 0x{other:02x}, which a state dict does not need")),
            }
        }
    }

    /// Runs an opcode that makes a number or a text.
    fn scalar(&mut self, op: u8) -> Result<(), String> {
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
                let text =
                    std::str::from_utf8(self.bytes(length as usize)?).map_err(|_| "it has a text that is not UTF-8")?;
                Node::Text(text.to_owned())
            }
        };
        self.push(node)
    }

    /// Reads a two's complement integer that is preceded by its length in bytes.
    fn long(&mut self) -> Result<i64, String> {
        let length = self.byte()?.into();
        let bytes = self.bytes(length)?;
        if length > 8 {
            return Err(format!("it has an integer of {length} bytes"));
        }
        let fill = if bytes.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 };
        let mut extended = [fill; 8];
        extended[..length].copy_from_slice(bytes);
        Ok(i64::from_le_bytes(extended))
    }

    /// Runs an opcode on the stack, the marks or the memo.
    fn stack_op(&mut self, op: u8) -> Result<(), String> {
        match op {
            b'(' => {
                if self.marks.len() == MAX_DEPTH {
                    return Err(format!("it is nested deeper than {MAX_DEPTH}"));
                }
                self.marks.push(self.stack.len());
            }
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'h' | b'j' => {
                let key = if op == b'h' { self.byte()?.into() } else { u32::from_le_bytes(self.array()?) };
                let id = *self.memo.get(&key).ok_or("it refers to a memo entry that does not exist")?;
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
                if self.memo.len() > MAX_NODES {
                    return Err(format!("it has more than {MAX_NODES} memo entries"));
                }
            }
        }
        Ok(())
    }

    /// Runs an opcode that makes or extends a tuple, list or dictionary.
    fn collection(&mut self, op: u8) -> Result<(), String> {
        match op {
            b')' => self.push(Node::Tuple(Vec::new())),
            0x85..=0x87 => {
                let mut items = (0..op - 0x84).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
                items.reverse();
                self.push(Node::Tuple(items))
            }
            b't' | b'l' => {
                let items = self.pop_mark()?;
                self.push(if op == b't' { Node::Tuple(items) } else { Node::List(items) })
            }
            b']' => self.push(Node::List(Vec::new())),
            b'}' => self.push(Node::Dict(Vec::new())),
            b'd' => {
                let items = pairs(&self.pop_mark()?)?;
                self.push(Node::Dict(items))
            }
            b'a' | b'e' => {
                let items = if op == b'a' { vec![self.pop()?] } else { self.pop_mark()? };
                match self.top_node()? {
                    Node::List(list) => list.extend(items),
                    _ => return Err("it appends to a value that is not a list".into()),
                }
                Ok(())
            }
            _ => {
                let mut items = if op == b's' { vec![self.pop()?, self.pop()?] } else { self.pop_mark()? };
                if op == b's' {
                    items.reverse();
                }
                let items = pairs(&items)?;
                match self.top_node()? {
                    Node::Dict(dict) => dict.extend(items),
                    _ => return Err("it sets items of a value that is not a dictionary".into()),
                }
                Ok(())
            }
        }
    }

    /// Runs an opcode on a global name or an object; `torch` decides what is allowed.
    fn object(&mut self, op: u8) -> Result<(), String> {
        let node = match op {
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                Node::Global(torch::find_global(module, name)?)
            }
            0x93 => {
                let name = self.pop()?;
                let module = self.pop()?;
                match (&self.nodes[module], &self.nodes[name]) {
                    (Node::Text(module), Node::Text(name)) => Node::Global(torch::find_global(module, name)?),
                    _ => return Err("it has a global whose name is not a text".into()),
                }
            }
            b'Q' => {
                let id = self.pop()?;
                torch::persistent_load(&self.nodes, id)?
            }
            b'b' => {
                let state = self.pop()?;
                let object = self.top()?;
                return torch::build(&mut self.nodes, object, state);
            }
            _ => {
                let arguments = self.pop()?;
                let callable = self.pop()?;
                torch::call(&self.nodes, callable, arguments)?
            }
        };
        self.push(node)
    }

    fn push(&mut self, node: Node) -> Result<(), String> {
        if self.nodes.len() == MAX_NODES {
            return Err(format!("it has more than {MAX_NODES} values"));
        }
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
        Ok(())
    }

    fn pop(&mut self) -> Result<NodeId, String> {
        let id = self.top()?;
        self.stack.pop();
        Ok(id)
    }

    /// Returns the top of the stack, which must be above the last mark.
    fn top(&self) -> Result<NodeId, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack[floor..]
            .last()
            .copied()
            .ok_or_else(|| "it takes more values from the stack than it put there".to_owned())
    }

    fn top_node(&mut self) -> Result<&mut Node, String> {
        let id = self.top()?;
        Ok(&mut self.nodes[id])
    }

    /// Removes the last mark and returns all values above it.
    fn pop_mark(&mut self) -> Result<Vec<NodeId>, String> {
        let mark = self.marks.pop().ok_or("it lacks a mark")?;
        Ok(self.stack.split_off(mark))
    }

    fn bytes(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (bytes, rest) = self.bytes.split_at_checked(length).ok_or("it ends too early")?;
        self.bytes = rest;
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.bytes(1)?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        Ok(self.bytes(N)?.try_into().expect("N bytes"))
    }

    /// Reads up to the next line feed.
    fn line(&mut self) -> Result<&'a str, String> {
        let length = self.bytes.iter().position(|&byte| byte == b'\n').ok_or("it ends too early")?;
        let line = std::str::from_utf8(self.bytes(length + 1)?).map_err(|_| "it has a name that is not UTF-8")?;
        Ok(line.trim_end_matches('\n'))
    }
}

fn pairs(items: &[NodeId]) -> Result<Vec<(NodeId, NodeId)>, String> {
    if !items.len().is_multiple_of(2) {
        return Err("it has a key without a value".into());
    }
    Ok(items.chunks(2).map(|pair| (pair[0], pair[1])).collect())
}
