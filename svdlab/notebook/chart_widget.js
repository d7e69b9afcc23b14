// A chart over probes in a notebook, and a hand that points at one: at its marks, or above or below them.

function render({ model, el }) {
  const draw = drawer(el);
  let view;
  el.classList.add("svdlab-chart-widget");
  const mark = () => view?.signal("chosen", model.get("chosen")).run();
  const show = async () => {
    const content = model.get("content");
    if (!content.spec) return;
    const drawn = await draw(content);
    if (!drawn) return;
    view = drawn;
    mark();
    const svg = view.container().querySelector("svg"), frame = svg.querySelector(".role-frame > g");
    svg.addEventListener("click", (event) => {
      const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(frame.getScreenCTM().inverse());
      const across = view.scale("x"), away = (probe) => Math.abs(across(probe) - x);
      const nearest = across.domain().reduce((one, other) => (away(other) < away(one) ? other : one));
      if (y >= 0 && away(nearest) < 20) model.send({ probe: nearest });
    });
  };
  model.on("change:content", show);
  model.on("change:chosen", mark);
  show();
  return () => {
    model.off("change:content", show);
    model.off("change:chosen", mark);
    view?.finalize();
  };
}

export default { render };
