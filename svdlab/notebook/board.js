// A sweep's board: one clock for all its clips, and one mark for all that shows the same point. The same module runs in
// a widget, whose model keeps frame, playing and chosen, and in a page without a kernel.

class Board extends Clock {
  constructor(root, changed) {
    super(changed);
    this.root = root;
    root.querySelector(".clock").replaceChildren(this.controls);
    root.addEventListener("click", (event) => {
      const point = event.target.closest("[data-point]");
      if (!point) return;
      this.choose(point.dataset.point);
      this.changed({ chosen: point.dataset.point });
    });
    this.choose(root.dataset.chosen);
    this.count(Number(root.dataset.frames), Number(root.dataset.fps));
  }

  all(what) {
    return [...this.root.querySelectorAll(what)];
  }

  choose(key) {
    for (const one of this.all("[data-point]")) {
      const marked = one.dataset.point === key;
      if (one.matches("button")) one.setAttribute("aria-pressed", marked);
      one.classList.toggle("marked", marked);
    }
    for (const detail of this.all("[data-detail]")) {
      detail.hidden = detail.dataset.detail !== key;
      const large = detail.querySelector(".large");
      if (detail.hidden || !large || large.childElementCount) continue;
      large.append(...this.all(`button[data-point="${key}"] .film`).map((film) => film.cloneNode(true)));
    }
    this.run();
  }

  // A film is all frames of a clip in one picture, of which one is in sight.
  draw() {
    for (const film of this.all(".film")) {
      const [count, columns, rows] = ["frames", "columns", "rows"].map((name) => Number(film.dataset[name]));
      const i = Math.min(this.frame, count - 1); // a shorter clip holds its last frame
      if (film.dataset.frame === String(i)) continue;
      film.dataset.frame = i;
      const [x, y] = [(i % columns) / columns, Math.floor(i / columns) / rows];
      film.firstElementChild.style.transform = `translate(${-100 * x}%, ${-100 * y}%)`;
    }
  }
}

function render({ model, el }) {
  const changed = (values) => {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
  };
  let board = null, end = () => {};
  const choose = () => model.get("chosen") && board?.choose(model.get("chosen"));
  const show = () => {
    end();
    const focused = el.contains(document.activeElement) ? document.activeElement.dataset.point : null;
    el.innerHTML = model.get("html");
    const root = el.querySelector(".svdlab-board");
    board = root && new Board(root, changed);
    end = board ? board.follow(model) : () => {};
    choose();
    // What is drawn anew while clips come keeps the keyboard where it was.
    if (focused) el.querySelector(`button[data-point="${focused}"]`)?.focus();
  };
  model.on("change:html", show);
  model.on("change:chosen", choose);
  show();
  return () => {
    model.off("change:html", show);
    model.off("change:chosen", choose);
    end();
  };
}

for (const root of document.querySelectorAll(".svdlab-board:not([data-alive])")) {
  root.dataset.alive = ""; // in a page without a kernel
  new Board(root);
}

export default { render };
