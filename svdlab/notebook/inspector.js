// The tensor inspector. What it shows is the answer to a question (which tensor, which index, compared with what): in a
// notebook Python answers, in a page without a kernel the tensors that the page carries.

const make = (tag, attributes = {}, ...children) => {
  const svg = tag === "svg" || tag === "path";
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && !svg) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
};

const short = (value) => String(Number(value.toPrecision(3)));
const times = (power) => `2${String(power).replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit])} times`;
const percent = (share) => `${Number((100 * share).toPrecision(3))} %`;

// A float32 in the fewest digits that give it back, anything wider as the language prints it.
function exact(value, single) {
  for (let digits = 1; single && digits < 10; digits++) {
    const near = Number(value.toPrecision(digits));
    if (Math.fround(near) === value) return String(near);
  }
  return String(value);
}

// Values as pixels: 256 colours over [low, high], and the last one of the map for what is not finite.
function paint(canvas, { values, low, high, map }, rows, columns) {
  const image = new ImageData(columns, rows), pixels = new Uint32Array(image.data.buffer);
  const colours = Uint32Array.from({ length: 257 }, (_, i) => (255 << 24) | (map[3 * i + 2] << 16) | (map[3 * i + 1] << 8) | map[3 * i]);
  values.forEach((value, i) => {
    const at = Math.floor(((value - low) / (high - low)) * 256);
    pixels[i] = colours[Number.isFinite(value) ? Math.min(255, Math.max(0, at)) : 256];
  });
  Object.assign(canvas, { width: columns, height: rows }).getContext("2d").putImageData(image, 0, 0);
}

// Lines over a common axis, as wide and as high as there is room; a gap where a value is not finite.
function curves(name, low, high, ...lines) {
  const plot = make("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": name });
  for (const { values, colour, dashes } of lines) {
    let path = "", pen = "M";
    values.forEach((value, i) => {
      if (!Number.isFinite(value)) return (pen = "M");
      path += `${pen}${((i + 0.5) / values.length) * 100} ${98 - (96 * (value - low)) / (high - low || 1)}`;
      if (pen === "M") path += "h.01";
      pen = "L";
    });
    plot.append(make("path", { d: path, stroke: colour, "stroke-dasharray": dashes ?? "none" }));
  }
  return plot;
}

const figure = (name, body, ...below) => make("figure", {}, make("figcaption", {}, name), body, make("small", {}, ...below));
const ends = (low, high) => [make("span", {}, short(low)), make("span", {}, short(high))];

function slider(name, value, max, said, change) {
  const shown = make("output", {}, said(value));
  const input = make("input", { type: "range", min: 0, max, value, "aria-label": name });
  input.addEventListener("input", () => change(input.valueAsNumber));
  const set = (now) => {
    input.value = now;
    shown.value = said(now);
    input.setAttribute("aria-valuetext", said(now));
  };
  input.addEventListener("input", () => set(input.valueAsNumber));
  return { element: make("label", {}, make("span", {}, name), input, shown), set };
}

let inspectors = 0;

// Fills an element, and gives two functions: one takes the list of a comparison's tensors and how they look, the other
// shows an answer of "ask".
function inspector(root, ask) {
  const id = `svdlab-inspector-${inspectors++}`;
  let rows, look, options, view, cursor = [0, 0], gain = 0, family, scaled, controlled, update;
  const send = (changes) => ask({ probe: view.probe, index: view.index, against: view.against, ...changes });
  const few = () => view.flat && view.columns <= look.few; // numbers that are a table
  const along = (axis, i) => send({ index: view.index.map((old, a) => (a === axis ? i : old)) });

  const filter = make("input", { type: "search", placeholder: "filter", "aria-label": "filter tensors by name" });
  const filtered = () => options.forEach((option, name) => (option.hidden = !name.includes(filter.value)));
  filter.addEventListener("input", filtered);
  const list = make("div", { role: "listbox", tabIndex: 0, "aria-label": "tensors, in order of execution" });
  function fill(now) {
    ({ rows, look } = now);
    options = new Map(rows.map((row) => [row.name, make("div", {
      role: "option", id: `${id}-${row.name}`, className: row.wrong ? "wrong" : "", "aria-disabled": String(row.absent),
      onclick: () => row.absent || send({ probe: row.name, index: null }),
    }, make("span", {}, row.name), make("i", { style: `--part:${row.part}` }), make("span", {}, row.ratio), make("span", {}, row.divergence))]));
    list.replaceChildren(...options.values());
    filtered();
  }
  list.addEventListener("keydown", (event) => {
    const names = rows.filter(({ name, absent }) => !absent && !options.get(name).hidden).map(({ name }) => name);
    const at = names.indexOf(view.probe);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: names.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (names[to]) send({ probe: names[to], index: null });
  });
  const head = make("div", { className: "head" }, ...["tensor", "noise ratio", "diverg."].map((name) => make("span", {}, name)));

  const title = make("p", { className: "title", role: "status" }), controls = make("div", { className: "controls" });
  const readout = make("p", { className: "readout", "aria-live": "polite" }), where = make("div", { className: "panes where" });
  const panes = make("div", { className: "panes", tabIndex: 0, role: "application", "aria-label": "maps; the arrow keys move the cursor" });
  panes.addEventListener("keydown", (event) => {
    const step = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key];
    if (!step) return;
    event.preventDefault();
    point(cursor[0] + step[0], cursor[1] + step[1]);
  });
  root.dataset.lmSuppressShortcuts = "true"; // JupyterLab would take the keys for its own
  root.replaceChildren(make("div", { className: "list" }, filter, head, list), make("div", { className: "shown" }, title, controls, panes, readout, where));

  // The values at a row and a column of the plane, in every pane.
  function point(row, column) {
    cursor = [Math.min(view.rows - 1, Math.max(0, row)), Math.min(view.columns - 1, Math.max(0, column))];
    const at = cursor[0] * view.columns + cursor[1], single = view.dtype === "float32";
    for (const mark of panes.querySelectorAll(".cursor")) {
      Object.assign(mark.style, { left: `${(100 * cursor[1]) / view.columns}%`, top: `${(100 * cursor[0]) / view.rows}%` });
      Object.assign(mark.style, { width: `${100 / view.columns}%`, height: `${100 / view.rows}%` });
    }
    const said = {
      index: `[${[...view.index, ...cursor.slice(view.index.length + 2 - view.shape.length)].join(", ")}]`,
      [look.names[view.against]]: exact(view.reference[at], single),
      [look.names.candidate]: exact(view.candidate[at], single),
      difference: String(view.candidate[at] - view.reference[at]),
    };
    readout.replaceChildren(...Object.entries(said).map(([name, value]) => make("span", {}, `${name} `, make("output", { "aria-label": name }, value))));
  }
  const follow = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    point(Math.floor(y * view.rows), Math.floor(x * view.columns));
  };
  const tracked = (picture) => make("div", { onpointermove: follow, onpointerdown: follow }, picture, make("b", { className: "cursor" }));

  // Sliders stay in place, so that one can be dragged, until a tensor of another kind is shown.
  function drawControls() {
    const same = rows.filter(({ name, absent }) => !absent && name.replace(/\d{3,}$/, "") === family).map(({ name }) => name);
    const scale = JSON.stringify([family, view.axes, view.against]);
    const wanted = JSON.stringify([scale, same, look.against.map((role) => look.names[role])]);
    if (scaled !== scale) [scaled, gain] = [scale, view.gain];
    if (controlled !== wanted) {
      controlled = wanted;
      const made = view.axes.map(([name, size], axis) => [slider(name, 0, size - 1, (i) => `${i} of 0 to ${size - 1}`, (i) => along(axis, i)), size]);
      const step = slider("denoising step", 0, same.length - 1, (i) => same[i].slice(family.length), (i) => send({ probe: same[i] }));
      const brighter = slider("gain of the difference", gain, look.max_gain, times, (i) => {
        gain = i;
        drawPanes();
      });
      const against = make("select", { "aria-label": "compared with" }, ...look.against.map((role) => make("option", { value: role }, look.names[role])));
      against.value = view.against;
      against.addEventListener("change", () => send({ against: against.value }));
      const worst = make("button", { type: "button", disabled: !view.difference, onclick: () => send({ index: null }) }, "largest difference");
      const shown = [...(same.length > 1 ? [step] : []), ...made.filter(([, size]) => size > 1).map(([one]) => one), ...(few() ? [] : [brighter])];
      controls.replaceChildren(...shown.map(({ element }) => element), make("label", {}, make("span", {}, "compared with"), against), ...(few() ? [] : [worst]));
      update = () => {
        step.set(same.indexOf(view.probe));
        made.forEach(([one], axis) => one.set(view.index[axis]));
      };
    }
    update();
  }

  // A table of a few numbers, curves of a vector, heat maps of a plane.
  function drawPanes() {
    const { reference, candidate, high, rows: height, columns: width } = view;
    const difference = Float64Array.from(candidate, (value, i) => value - reference[i]), reach = high / 2 ** gain;
    const low = view.signed ? -high : 0, map = view.signed ? look.diverging : look.sequential;
    const shown = [
      { name: look.names[view.against], values: reference, low, high, map, colour: look.colours.reference },
      { name: look.names.candidate, values: candidate, low, high, map, colour: look.colours.candidate, dashes: "5 3" },
      { name: gain ? `difference, enlarged ${times(gain)}` : "difference", values: difference, low: -reach, high: reach, map: look.diverging, colour: look.colours.difference },
    ];
    if (few()) {
      const row = ({ name, values }, single) => make("tr", {}, make("th", { scope: "row" }, name),
        ...Array.from(values, (value, i) => make("td", { onpointerenter: () => point(0, i) }, exact(value, single))));
      const single = view.dtype === "float32";
      panes.replaceChildren(make("table", {}, make("tr", {}, make("th", {}, view.along), ...view.labels.map((label) => make("th", { scope: "col" }, label))),
        row(shown[0], single), row(shown[1], single), row({ name: "difference", values: difference }, false)));
    } else if (view.flat) {
      const plot = (name, from, to, ...lines) => figure(name, tracked(curves(name, from, to, ...lines)), ...ends(from, to));
      panes.replaceChildren(plot(`${shown[0].name} (solid) and ${shown[1].name} (dashed), by ${view.along}`, low, high, shown[0], shown[1]),
        plot(`${shown[2].name}, by ${view.along}`, -reach, reach, shown[2]));
    } else {
      panes.replaceChildren(...shown.map((one) => {
        const canvas = make("canvas", { role: "img", "aria-label": one.name });
        paint(canvas, one, height, width);
        const stops = [0, 64, 128, 192, 255].map((i) => `rgb(${one.map.slice(3 * i, 3 * i + 3).join()})`);
        const scale = make("i", { style: `background:linear-gradient(to right, ${stops.join()})` });
        const [from, to] = ends(one.low, one.high);
        const pane = figure(one.name, tracked(canvas), from, scale, to);
        pane.style.maxWidth = `${Math.min(40, Math.max(8, (18 * width) / height))}rem`;
        return pane;
      }));
    }
    panes.classList.toggle("flat", view.flat);
    point(...cursor);
  }

  // Where in the whole tensor the difference sits.
  function drawWhere() {
    if (few()) return where.replaceChildren();
    const log = (values, colour, dashes) => ({ values: values.map((count) => Math.log10(1 + count)), colour, dashes });
    const { edge, reference, candidate, difference } = view.histograms;
    const chart = (name, low, high, ...lines) => figure(name, curves(name, 0, Math.max(...lines.flatMap(({ values }) => values)), ...lines), ...ends(low, high));
    const shares = view.shares.flatMap((share, axis) => {
      const [name, size] = view.axes[axis], top = Math.max(...share);
      if (size < 2) return [];
      const most = `most at ${name} ${share.indexOf(top)}: ${percent(top)}`;
      const bars = share.map((part, i) => make("i", { className: i === view.index[axis] ? "now" : "", title: `${name} ${i}: ${percent(part)}`,
        style: `--part:${part / top}`, onclick: () => along(axis, i) }));
      return figure(`squared error by ${name}`, make("div", { className: "bars", role: "img", "aria-label": most }, ...bars), most);
    });
    where.replaceChildren(
      chart("values (log count)", edge.low, edge.high, log(reference, look.colours.reference), log(candidate, look.colours.candidate, "5 3")),
      chart("differences (log count)", -view.difference, view.difference, log(difference, look.colours.difference)), ...shares);
  }

  const show = (answer) => {
    if (answer.error) return title.replaceChildren(make("b", { role: "alert" }, answer.error));
    view = answer;
    family = view.probe.replace(/\d{3,}$/, "");
    if (view.cell) cursor = view.cell;
    options.forEach((option, name) => option.setAttribute("aria-selected", String(name === view.probe)));
    const chosen = options.get(view.probe);
    list.setAttribute("aria-activedescendant", chosen.id);
    const hidden = chosen.offsetTop < list.scrollTop || chosen.offsetTop > list.scrollTop + list.clientHeight - chosen.offsetHeight;
    if (hidden) list.scrollTop = chosen.offsetTop - list.clientHeight / 2;
    title.replaceChildren(make("b", {}, view.probe), ` (${view.shape.join(", ")}): ${view.said}`);
    drawControls();
    drawPanes();
    drawWhere();
  };
  return { fill, show };
}

const values = (dtype, buffer) => (dtype === "float32" ? new Float32Array(buffer) : new Float64Array(buffer));
const bytes = ({ buffer, byteOffset, byteLength }) => buffer.slice(byteOffset, byteOffset + byteLength);

function render({ model, el }) {
  el.classList.add("svdlab-inspector");
  let rows, colours;
  const { fill, show } = inspector(el, (asked) => {
    model.set("asked", { ...asked, turn: (model.get("asked").turn ?? 0) + 1 }); // a question that was asked before is one, too
    model.save_changes();
  });
  const answered = () => {
    if (rows !== model.get("rows") || colours !== model.get("look")) {
      [rows, colours] = [model.get("rows"), model.get("look")];
      const look = { ...colours };
      for (const name of ["diverging", "sequential"]) look[name] = new Uint8Array(bytes(look[name]));
      fill({ rows, look });
    }
    const view = { ...model.get("view") };
    for (const name of view.error ? [] : ["reference", "candidate"]) view[name] = values(view.dtype, bytes(view[name]));
    show(view);
  };
  const heard = ["change:rows", "change:look", "change:view"];
  for (const change of heard) model.on(change, answered);
  answered();
  return () => heard.forEach((change) => model.off(change, answered));
}

for (const root of document.querySelectorAll("figure.svdlab-inspector[data-inspector]")) {
  const { rows, look, tensors } = JSON.parse(root.dataset.inspector);
  root.removeAttribute("data-inspector"); // it lives
  const decoded = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  for (const name of ["diverging", "sequential"]) look[name] = decoded(look[name]);
  for (const tensor of Object.values(tensors)) {
    for (const role of ["reference", "candidate"]) tensor[role] = values(tensor.dtype, decoded(tensor[role]).buffer);
  }
  const answer = ({ probe, index }) => {
    const tensor = tensors[probe], at = index ?? tensor.worst, size = tensor.rows * tensor.columns;
    const start = size * at.reduce((sum, i, axis) => sum * tensor.axes[axis][1] + i, 0);
    const plane = (role) => tensor[role].subarray(start, start + size);
    show({ ...tensor, index: at, cell: index ? null : tensor.cell, reference: plane("reference"), candidate: plane("candidate") });
  };
  const { fill, show } = inspector(root, answer);
  fill({ rows, look });
  const carried = rows.filter(({ absent }) => !absent);
  answer({ probe: (carried.find(({ wrong }) => wrong) ?? carried[0]).name, index: null });
}

export default { render };
